"""Image files: which formats are read, whether they are there, how they are recognised later."""

import hashlib
import os
import stat

from PIL import Image
from tqdm import tqdm

from auxilearn.errors import UserError

# Other formats of Pillow are programs (Ghostscript runs EPS) or exist on one system alone.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


def in_rgb(image):
    """A Pillow image in RGB. ValueError: over 8 bits per channel, which RGB would clip to white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"more than 8 bits per channel, mode {image.mode}; expected 8")
    return image.convert("RGB")


def image_size(folder, path, where="", *, cure):
    """The byte size of an image file, which must be there and not empty.

    Args: ``where`` and ``cure``: the beginning and the end of the ``UserError`` otherwise.
    """
    file = folder / path
    try:
        status = file.stat()
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(None, "it is a folder")
    except (OSError, ValueError) as error:  # ValueError: a null byte, of a damaged file
        reason = getattr(error, "strerror", None) or error
        if "\\" in path and (folder / path.replace("\\", "/")).exists():
            cure = "folders are parted by / on every system: replace each \\ in the file by /"
        elif os.path.islink(file):
            cure = "it is a link that leads nowhere: fetch its content (dvc pull, git annex get)"
        raise UserError(f"{where}cannot find image file {file}: {reason}; {cure}") from None
    if status.st_size == 0:
        raise UserError(f"{where}image file {file} is empty; {cure}")
    return status.st_size


def hash_images(folder, paths, cure="put it back"):
    """A hex digest of the paths and byte sizes of images below ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path}\t{image_size(folder, path, cure=cure)}\n".encode())
    return digest.hexdigest()


def check_images(folder, paths, cure="replace them"):
    """Decode every image in full. Raises ``UserError`` naming those that cannot be read."""
    bad = []
    for path in tqdm(paths, "decoding images", unit="image", disable=None):
        file = folder / path
        try:
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                in_rgb(image)
        except Exception as error:  # Pillow's decoders raise many kinds on damaged files
            bad.append(f"{file} ({error})")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"{len(bad)} of {len(paths)} images cannot be decoded: {', '.join(bad[:3])}{more}; "
            f"{cure}"
        )
