"""Run the command as a module: `accelerate launch -m ccssl_hf.cli train ...`."""

from . import app

if __name__ == "__main__":
    app(prog_name="ccssl-hf")
