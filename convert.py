"""Fuses a trained network, proves that both forms are equal, and writes it for runtimes."""

from repvgg_jax.convert import command

if __name__ == "__main__":
    command.run()
