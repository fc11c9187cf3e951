"""Where other packs put themselves around what ComfyUI does."""


class WrappersMP:
    PREPARE_SAMPLING = "prepare_sampling"
