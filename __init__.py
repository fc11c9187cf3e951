"""ComfyUI-DCDD: distribution-conditioned diffusion decoding as a ComfyUI node pack.

ComfyUI loads this folder as a package under a name of its own, taken from the folder's path. So every import inside the
pack is relative, and none stands at the top of this file. The library is `dcdd_core`.
"""
