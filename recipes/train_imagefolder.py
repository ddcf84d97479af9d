"""Train on one's own image folders, with any timm backbone.

    accelerate launch recipes/train_imagefolder.py --data_dir my_images --backbone resnet50 --pretrained [any flag]

`my_images` holds `labeled/<class>/*.jpg`, `unlabeled/**` and, if there are any, `validation/<class>/*.jpg` and
`test/<class>/*.jpg`; a folder elsewhere is named by `--labeled`, `--unlabeled`, `--validation` or `--test`. Settings
are in recipes/configs/imagefolder.yaml; a flag overrides the file.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ccssl_hf import CCSSLTrainingArguments
from ccssl_hf.errors import errors_in_one_line
from ccssl_hf.recipe import ROLES, RecipeArguments, build_trainer, parse_recipe, train

CONFIG = Path(__file__).parent / "configs" / "imagefolder.yaml"


@dataclass
class FolderArguments(RecipeArguments):
    """A root folder stands for the splits that it holds."""

    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with labeled/, unlabeled/, validation/ and test/."}
    )

    def __post_init__(self) -> None:
        if self.data_dir is None:
            return
        for role in ROLES:
            folder = Path(self.data_dir) / role
            if getattr(self, role) is None and folder.is_dir():
                setattr(self, role, str(folder))
        if self.labeled is None:
            raise ValueError(
                f"--data_dir {self.data_dir}: no folder labeled/ in it; make labeled/<class>/ with some images."
            )


if __name__ == "__main__":
    with errors_in_one_line():
        recipe, args = parse_recipe(FolderArguments, CCSSLTrainingArguments, config=CONFIG, description=__doc__)
        trainer, splits = build_trainer(recipe, args)
    train(trainer, splits)
