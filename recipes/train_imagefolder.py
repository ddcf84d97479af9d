"""Train on one's own image folders, with any timm backbone: `ccssl-hf train` as a script.

    accelerate launch recipes/train_imagefolder.py --data_dir my_images --backbone resnet50 --pretrained [any flag]

`my_images` holds `labeled/<class>/*.jpg`, `unlabeled/**` and, if there are any, `validation/<class>/*.jpg` and
`test/<class>/*.jpg`; a folder elsewhere is named by `--labeled`, `--unlabeled`, `--validation` or `--test`. Settings
are in ccssl_hf/configs/imagefolder.yaml; a flag overrides the file.
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
