"""Weight files of other projects."""

FORMATS = ("ours", "official", "official-sparse", "timm", "transformers", "mmpretrain")
