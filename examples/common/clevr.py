"""The CLEVR v1.0 directory: images and scene files as released, or in the same layout."""

from os import PathLike

from torch.utils.data import Dataset

from common.scenes import Scenes


class ClevrDataset(Dataset[Scenes]):
    """Images of a split with boxes and states; item i is a `Scenes` without the batch dimension.

    The default collation of a `DataLoader` gives `Scenes` with it. Images are decoded and resized once, by several
    processes, into one array on disk that every later use maps into memory.

    Args:
        root: Directory that holds `images/SPLIT/*.png` and `scenes/CLEVR_SPLIT_scenes.json`.
        split: "train" or "val"; the released "test" split has no scene file.
        size: Width and height S of the images in pixels.
        max_objects: Rows N of boxes, states and mask; a scene with more objects is an error.
        cache: Directory of the resized images; None is `$XDG_CACHE_HOME/setpred`, or `~/.cache/setpred`.
        clip_boxes: Clip boxes to the image; the published ones are not.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        split: str,
        *,
        size: int = 128,
        max_objects: int = 10,
        cache: str | PathLike[str] | None = None,
        clip_boxes: bool = False,
    ) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Scenes:
        raise NotImplementedError
