"""Train on Semi-iNat 2021, or on data in the same form, with the paper's settings.

    accelerate launch recipes/train_semi_inat.py --labeled L --unlabeled U --validation V [--test T]

Each split is an image folder, parquet files or a dataset on the Hub. Settings are in recipes/configs/semi_inat.yaml. A
flag overrides the file, and `--config mine.yaml` replaces it.
"""

from pathlib import Path

from ccssl_hf import CCSSLTrainingArguments
from ccssl_hf.cli.flags import parse_recipe
from ccssl_hf.errors import errors_in_one_line
from ccssl_hf.recipe import RecipeArguments, build_trainer, train

CONFIG = Path(__file__).parent / "configs" / "semi_inat.yaml"

if __name__ == "__main__":
    with errors_in_one_line():
        recipe, args = parse_recipe(RecipeArguments, CCSSLTrainingArguments, config=CONFIG, description=__doc__)
        trainer, splits = build_trainer(recipe, args)
    train(trainer, splits)
