"""Raw images in: folders, archives and tables of pictures, numbered and labelled, read one by one."""

from mf_lightning.data.images.opening import open_images
from mf_lightning.data.images.source import ImageSource, Unreadable

__all__ = ["ImageSource", "Unreadable", "open_images"]
