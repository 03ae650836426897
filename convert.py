"""Fuses a trained RepVGG, proves the fused network equal and writes it for its runtimes.

python convert.py --workdir runs/digits --output deploy
python convert.py --from RepVGG-A0-train.pth --output deploy --format onnx,safetensors
"""

from repvgg_jax.convert import command

if __name__ == "__main__":
    command.run()
