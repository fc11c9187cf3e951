"""The ComfyUI nodes: they convert, call dcdd_core once, and convert back. The only room that imports ComfyUI."""
