"""Train on your own image folders, with any timm backbone. `ccssl-hf train` is the same run.

    accelerate launch recipes/train_imagefolder.py --data_dir photos --backbone resnet50 --pretrained

`photos` holds `labeled/<class>/*.jpg` and optionally `unlabeled/**`, `validation/<class>/*.jpg` and
`test/<class>/*.jpg`. `--labeled`, `--unlabeled`, `--validation` and `--test` name splits elsewhere. Settings are in
ccssl_hf/configs/imagefolder.yaml; a flag overrides the file.
"""

from ccssl_hf import CCSSLTrainingArguments
from ccssl_hf.cli.flags import parse_recipe
from ccssl_hf.errors import errors_in_one_line
from ccssl_hf.recipe import OWN_IMAGES, FolderArguments, build_trainer, train

if __name__ == "__main__":
    with errors_in_one_line():
        recipe, args = parse_recipe(FolderArguments, CCSSLTrainingArguments, config=OWN_IMAGES, description=__doc__)
        trainer, splits = build_trainer(recipe, args)
    train(trainer, splits)
