"""Weight files of other projects."""

FORMATS = ("ours", "official", "official-sparse", "timm", "timm-features", "transformers", "mmpretrain", "torchvision")
