"""A test double of ComfyUI: the least of it that the pack's nodes speak to, on a CPU, in this process.

`modules/` holds stand-ins under ComfyUI's own module names, `core_nodes` those of its own nodes that the shipped
workflows use, and `double` loads the pack as ComfyUI does and runs prompts. `tests/comfy/test_cases.py` holds it to the
real thing: the same cases run on both.
"""
