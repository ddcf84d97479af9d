"""Train on your own image folders, with any timm backbone. `ccssl-hf train` is the same run.

    accelerate launch recipes/train_imagefolder.py --data_dir photos --backbone resnet50 --pretrained

`photos` holds `labeled/<class>/*.jpg` and optionally `unlabeled/**`, `validation/<class>/*.jpg` and
`test/<class>/*.jpg`. `--labeled`, `--unlabeled`, `--validation` and `--test` name splits elsewhere. Settings are in
ccssl_hf/configs/imagefolder.yaml; a flag overrides the file.
"""

from ccssl_hf.cli.flags import parse_own_images
from ccssl_hf.errors import errors_in_one_line
from ccssl_hf.recipe import build_trainer, train

if __name__ == "__main__":
    with errors_in_one_line():
        trainer, splits = build_trainer(*parse_own_images(description=__doc__))
    train(trainer, splits)
