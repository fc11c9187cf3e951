"""A custom node pack for tests alone: what the tests ask of ComfyUI's process, and the nodes of tools_nodes.py.

The fixture copies both into the test server's custom_nodes; nothing else imports this one.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import threading
import time
import warnings
from collections import Counter

import comfy.model_management
import comfy.sd
import latent_preview
import torch
from aiohttp import web
from comfy.cli_args import LatentPreviewMethod, args
from server import PromptServer

import nodes

from .tools_nodes import NODE_CLASS_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS"]

# --- what the tests ask of the process --------------------------------------------------------------------------------

_memory = {"above": None, "raised": 0, "steps": 0}


def _pack_module(name: str):
    pack = next(key for key in sys.modules if key.endswith("ComfyUI-DCDD"))
    return importlib.import_module(f"{pack}.{name}")


def _limited(step):
    """`step`, which runs out of memory the second time that it is given more than so many pictures."""

    def limited(self, pictures, *args):
        if _memory["above"] is not None and len(pictures) > _memory["above"]:
            _memory["steps"] += 1
            if _memory["steps"] % 2 == 0:
                _memory["raised"] += 1
                raise torch.OutOfMemoryError(f"a test's own, at {len(pictures)} pictures")
        return step(self, pictures, *args)

    return limited


@PromptServer.instance.routes.post("/test/out_of_memory")
async def out_of_memory(request):
    """From now on, steps with more than `above` pictures run out of memory (null: none does); says how many did."""
    decoder = _pack_module("dcdd_core.models.decoder").DistributionConditionedDecoder
    loop = _pack_module("dcdd_core.models.autoregressive.token_loop").TokenLoop
    masked = _pack_module("dcdd_core.models.masked.network").MaskedTransformer
    if decoder.forward.__name__ != "limited":
        decoder.forward, loop._embed = _limited(decoder.forward), _limited(loop._embed)
        masked._embed = _limited(masked._embed)
    raised = _memory["raised"]
    _memory.update(above=(await request.json())["above"], raised=0, steps=0)
    return web.json_response({"raised": raised})


_autoencoder = {"fails": False}


@PromptServer.instance.routes.post("/test/autoencoder_out_of_memory")
async def autoencoder_out_of_memory(request):
    """Whether from now on decoding the painted latents runs out of memory."""
    kind = _pack_module("nodes.host").ManagedCodec
    if kind.decode.__name__ != "failing":
        decode = kind.decode

        def failing(self, latents):
            if _autoencoder["fails"]:
                raise RuntimeError("MPS backend out of memory, a test's own")
            return decode(self, latents)

        kind.decode = failing
    _autoencoder.update(await request.json())
    return web.json_response({})


@PromptServer.instance.routes.post("/test/patience")
async def patience(request):
    """Seconds after which the decoder says that it reads a new schedule; answers with what it was."""
    decode = _pack_module("nodes.decode")
    before, decode._LONG = decode._LONG, (await request.json())["seconds"]
    return web.json_response(before)


_loads = []


@PromptServer.instance.routes.post("/test/loads")
async def loads(request):
    """What was asked of ComfyUI's memory manager since the last call: the models' classes, and bytes to work in."""
    load = comfy.model_management.load_models_gpu
    if load.__name__ != "recording":

        def recording(models, memory_required=0, **more):
            _loads.append([[type(patcher.model).__name__ for patcher in models], memory_required])
            return load(models, memory_required=memory_required, **more)

        comfy.model_management.load_models_gpu = recording
    found, _loads[:] = list(_loads), []
    return web.json_response(found)


@PromptServer.instance.routes.get("/test/noticed")
async def noticed(request):
    """What becomes of the library's warnings and of others': the texts of notices, and those that stay warnings."""
    host, told = _pack_module("nodes.host"), []
    notice, host.notice = host.notice, told.append
    try:
        with warnings.catch_warnings(record=True) as stayed:
            warnings.simplefilter("always")
            with host.noticed():
                warnings.warn("ours", host.DCDDWarning, stacklevel=1)
                warnings.warn("theirs", UserWarning, stacklevel=1)
                warnings.warn("old", DeprecationWarning, stacklevel=1)
    finally:
        host.notice = notice
    return web.json_response({"notices": told, "warnings": [[str(w.message), w.category.__name__] for w in stayed]})


@PromptServer.instance.routes.get("/test/dtypes")
async def dtypes(request):
    """What 'auto' is for another model than pico on a machine with a GPU, by placement."""
    manager, load = comfy.model_management, _pack_module("nodes.load")
    kept = manager.get_torch_device, manager.should_use_bf16
    manager.get_torch_device, manager.should_use_bf16 = lambda: torch.device("cuda"), lambda device: True
    try:
        found = {place: str(load._torch_dtype("auto", "Janus", place)) for place in load.host.PLACEMENTS}
    finally:
        manager.get_torch_device, manager.should_use_bf16 = kept
    return web.json_response(found)


@PromptServer.instance.routes.post("/test/preview_method")
async def preview_method(request):
    """From now on, previews are shown as with this --preview-method."""
    method = LatentPreviewMethod((await request.json())["method"])
    # Newer versions take it from here for each prompt whose page has set none.
    args.preview_method = latent_preview.default_preview_method = method
    return web.json_response({})


@PromptServer.instance.routes.get("/test/freeing")
async def freeing(request):
    """Whether what /free asked for was not begun yet."""
    return web.json_response(bool(PromptServer.instance.prompt_queue.flags))


@PromptServer.instance.routes.get("/test/alive")
async def alive(request):
    """How many of the pack's models are in memory, by class."""
    classes = {"JanusSampler", "VQTokenizer", "KLCodec", "Managed"}
    gc.collect()
    return web.json_response(Counter(name for o in gc.get_objects() if (name := type(o).__name__) in classes))


@PromptServer.instance.routes.get("/test/sockets")
async def sockets(request):
    """Ids of the inputs and of the outputs of the pack's nodes, which /object_info does not tell."""
    schemas = {key: node.GET_SCHEMA() for key, node in nodes.NODE_CLASS_MAPPINGS.items() if key.startswith("DCDD_")}
    return web.json_response(
        {key: {"inputs": [x.id for x in s.inputs], "outputs": [x.id for x in s.outputs]} for key, s in schemas.items()}
    )


_text_encoders: dict[str, dict[str, int]] = {}
_load_clip = comfy.sd.load_clip


def _load_small_clip(*args, model_options=None, **values):
    return _load_clip(*args, model_options={**(model_options or {}), **_text_encoders}, **values)


@PromptServer.instance.routes.post("/test/text_encoders")
async def text_encoders(request):
    """From now on, text encoders are of these sizes, which ComfyUI does not read off their files; {}: of their own."""
    _text_encoders.clear()
    _text_encoders.update(await request.json())
    comfy.sd.load_clip = _load_small_clip if _text_encoders else _load_clip
    return web.json_response({})


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


# Should the tests be killed, their server goes too.
threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
