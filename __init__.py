"""ComfyUI-DCDD: distribution-conditioned diffusion decoding as a ComfyUI node pack.

ComfyUI loads this folder as a package under a name of its own, taken from the folder's path. So every import inside the
pack is relative, and none stands at the top of this file. The library is `dcdd_core`.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls to get the nodes; of a failure it would log a line, so the traceback is logged here."""
    import logging

    try:
        from .nodes import extension

        return extension()
    except Exception:
        logging.getLogger(__name__).exception("ComfyUI-DCDD could not be loaded")
        raise
