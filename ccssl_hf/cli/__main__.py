"""`python -m ccssl_hf.cli`, for `accelerate launch -m ccssl_hf.cli train ...`."""

from . import app

if __name__ == "__main__":
    app(prog_name="ccssl-hf")
