"""Fuses a trained RepVGG, proves the fused network equal and writes it for its runtimes."""

from repvgg_jax.convert import command

if __name__ == "__main__":
    command.run()
