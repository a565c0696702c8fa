"""Loading a checkpoint: tokenizer, model, image processor, and the pruning method.

Handles full LLaVA-1.5 / LLaVA-NeXT checkpoints (Llama or Mistral) in the original layout and in
that of transformers (llava-hf), a projector trained on top of a base model, unmerged LoRA adapters,
Qwen2.5-VL, and plain language models. Everything is read from local folders (or the hub's cache);
no code of a checkpoint is ever run.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from accelerate import init_empty_weights
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.modeling_utils import no_init_weights

from ..checkpoint_kind import (
    NON_LORA,
    OTHER_FAMILIES,
    SUPPORTED,
    Kind,
    kind_of,
    projector_file,
)
from ..config_file import (
    check_config,
    earlier_words,
    first_line,
    one_sentence,
    read_config,
    read_json,
    shown,
)
from ..constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    STRATEGIES,
)
from ..llava_hf import layout_note, name_here
from ..log_output import say
from ..pruning import Pruner, pruner_from_keywords
from ..pruning.required import required
from ..weight_files import local_folder, uses_cache_dir
from . import qwen2_5_vl_loading
from .checkpoint import (
    TOWER_PREFIX,
    Filler,
    build_empty,
    clean_trainable_names,
    merge_lora,
    model_config,
    read_file,
    read_tensors,
)
from .context import position_limit
from .generation import check_strategy
from .language_model.attention import check_backend, check_dtype
from .language_model.compiling import check_compiler
from .language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from .language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from .later_tokenizer import OTHER_FILES
from .model_part import ModelPart
from .multimodal_encoder.builder import tower_beside
from .placement import (
    choose_device,
    choose_dtype,
    dtype_note,
    may_share,
    place,
    single_device,
)
from .quantization import import_bitsandbytes, quantize
from .qwen2_5_vl_rules import checked_config

DEFAULT_CONTEXT_LEN = 2048
#: tokens that a tokenizer may have beyond the model's vocabulary: image marks, padding, a few more
MAX_NEW_TOKENS_IN_VOCABULARY = 1024
FAMILIES = {
    "llama": (LlavaConfig, LlavaLlamaForCausalLM),
    "mistral": (LlavaMistralConfig, LlavaMistralForCausalLM),
}


@uses_cache_dir
def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | int | dict | None = "auto",
    device: str | torch.device | None = None,
    use_flash_attn: bool = False,
    torch_dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    pruner: Pruner | str | None = None,
    vision_tower: str | None = None,
    vision_tower_dtype: torch.dtype | None = None,
    generation_strategy: str | None = None,
    compile: bool = False,
    *,
    cache_dir: str | None = None,
    use_safetensors: bool | None = None,
    multimodal: bool | None = None,
    trust_remote_code: bool = False,
    low_cpu_mem_usage: bool = True,
    engine=None,
    **keywords,
):
    """Returns (tokenizer, model, image_processor, context_len), the model in eval mode.

    model_path:  folder (or hub repository) of the model, the projector or the adapter
    model_base:  folder of the model that a projector or adapter belongs to; None for full models
    model_name:  asked last: config and files say what the model is
    load_8bit, load_4bit: quantise the decoder's linear layers (needs the extra `quant`)
    device_map:  "auto", a device, or module name -> device
    device:      None is cuda if present, else mps, else cpu
    torch_dtype: None is float16 on a GPU; for Qwen2.5-VL, whose values leave its range, bfloat16
                 where the GPU has that. On the CPU it is what the checkpoint was saved in, except
                 that a half type which this CPU is slow at becomes float32: float16 always,
                 bfloat16 where the CPU has no instructions for it. A line on stderr says which
    attn_implementation: "sdpa" (default), "flash_attention_2" or "eager"
    pruner:      a Pruner or the name of a method; None is no pruning
    vision_tower: folder to use in place of the config's `mm_vision_tower`
    vision_tower_dtype: None is the model's own
    generation_strategy: what `generate` uses unless told otherwise; None: "autoregressive"
    compile:     whether steps of decoding are compiled, and on a GPU layers on prompts, see
                 `model.compile_decoding` and `model.compile_prefill`
    cache_dir:   where everything that is looked up on the hub is (model, tower, trained part)
    use_safetensors: True takes no `.bin` for the weights of the model or its base, False no
                 safetensors; None: safetensors where there are any
    multimodal:  True makes it a multimodal model whatever its config says
    trust_remote_code: only False: no code of a checkpoint is ever run
    low_cpu_mem_usage: accepted; little memory beside the weights is used in any case
    engine:      a `llava.engine.VLLMEngine`, in whose servers the decoder layers run: they are not
                 loaded here, and `generate` asks it
    keywords:    options of the method (`layer=3`), also without `pruner` where one method alone has
                 them (`important_ratio=0.5`, `twig=FOLDER`), and `twigvlm_config={...}`

    image_processor is None for plain language models. Raises ValueError or FileNotFoundError, with
    the names of file and weights, for whatever is missing, damaged or of the wrong shape, and
    TypeError for an unknown keyword, as programs that serve several versions of LLaVA expect.
    """
    pruner = pruner_from_keywords(pruner, keywords)
    generation_strategy = keywords.pop("generation_strategy", generation_strategy)
    generation_strategy = check_strategy(generation_strategy or STRATEGIES[0])
    if keywords:
        raise TypeError(
            "load_pretrained_model() got an unexpected keyword argument "
            f"{', '.join(map(repr, keywords))}: it is neither one of its own nor an option of a "
            "pruning method"
        )
    if trust_remote_code:
        raise ValueError(
            "trust_remote_code=True is refused: no code of a checkpoint is ever run here, and the "
            "supported models need none"
        )
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other")
    quantized = load_8bit or load_4bit
    folder = local_folder(model_path, use_safetensors)
    base = local_folder(model_base, use_safetensors) if model_base else None
    kind, values = kind_of(folder, base, model_name)
    if multimodal:
        kind = replace(kind, multimodal=True)
    if engine is not None:
        check_engine(engine, kind, pruner, model_path, quantized, compile)
    device = single_device(device_map, device) or choose_device(device)
    backend = "flash_attention_2" if use_flash_attn else attn_implementation or "sdpa"
    check_device(device, check_backend(backend), quantized, compile)
    source = config_path(folder, base)
    if kind.family in OTHER_FAMILIES:
        values = checked_config(values, source)
        qwen2_5_vl_loading.check_options(model_path, kind, base, vision_tower, pruner, values)
    else:
        values = check_config(values, source, plain=not kind.multimodal)
    dtype = choose_dtype(torch_dtype, values, device, quantized)
    check_dtype(backend, dtype)
    if torch_dtype is None and (note := dtype_note(dtype, values, device)):
        say(note)
    if note := layout_note(read_config(base or folder)):
        say(note)
    fill_device = "cpu" if quantized or may_share(device_map, device) else device

    # All small files first: what is wrong with them should not cost the reading of the weights.
    generation = load_generation_config(base or folder)
    how = backend, dtype, fill_device, use_safetensors
    if kind.family in OTHER_FAMILIES:
        loaded = qwen2_5_vl_loading.load(folder, base, values, *how)
    elif kind.multimodal:
        loaded = load_llava(
            folder,
            base,
            values,
            *how,
            kind=kind,
            vision_tower=vision_tower,
            tower_dtype=vision_tower_dtype,
            decoder=engine is None,
        )
    else:
        check_plain(model_path, pruner, compile)
        loaded = load_plain(folder, base, *how)
    tokenizer, model, image_processor = loaded

    if generation:
        model.generation_config = generation
    packed = None
    if quantized:
        packed = quantize(model, bits=4 if load_4bit else 8, dtype=dtype)
    model = place(model.eval(), device_map, device, packed)
    if image_processor is not None:
        model.engine, model.tokenizer = engine, tokenizer
        model.pruner = pruner
        model.compile_decoding = compile
        model.generation_strategy = generation_strategy
    context_len = getattr(model.config, "max_sequence_length", DEFAULT_CONTEXT_LEN)
    if kind.family in OTHER_FAMILIES:
        context_len = position_limit(model.config)
    if engine is not None:
        engine.connect(model, tokenizer)
    return tokenizer, model, image_processor, context_len


def check_device(device: torch.device, backend: str, quantized: bool, compile: bool) -> None:
    """Raises ValueError, or what says which package is missing, where a device cannot do this."""
    if backend == "flash_attention_2" and device.type != "cuda":
        raise ValueError(f"attn_implementation {backend!r} needs a CUDA device, not {device}")
    if compile:
        if quantized:
            raise ValueError("compile=True is for weights in 16 or 32 bits, not in 8 or 4")
        check_compiler(device)
    if quantized:
        import_bitsandbytes()


def check_engine(
    engine, kind: Kind, pruner: Pruner, model_path: str, quantized: bool, compile: bool
) -> None:
    """Raises ValueError where the decoder of such a model cannot be in a server, and what its
    servers raise that cannot be reached: all before the weights are read."""
    if not kind.multimodal:
        raise ValueError(f"{model_path} is a plain language model: ask the server itself")
    if quantized or compile:
        what = "compile" if compile else "load_8bit and load_4bit"
        raise ValueError(f"{what} is about the decoder layers, which are in {engine!r}")
    if kind.family in OTHER_FAMILIES:
        engine.check_model(qwen2_5_vl_loading.Qwen2_5_VLForConditionalGeneration)
    engine.check_method(pruner)
    engine.check_servers()


def check_plain(model_path: str, pruner: Pruner, compile: bool) -> None:
    """Raises ValueError for what a plain language model cannot do."""
    if pruner.name != "none":
        raise ValueError(f"{model_path} is a plain language model, {pruner!r} has no images")
    if compile:
        raise ValueError(f"{model_path} is a plain language model, which compile=True is not for")


def config_path(folder: str, base: str | None) -> str:
    """The config.json that describes the model: the folder's own, or that of its base."""
    own = os.path.join(folder, "config.json")
    return own if base is None or os.path.isfile(own) else os.path.join(base, "config.json")


def load_llava(
    folder: str,
    base: str | None,
    values: dict,
    backend: str,
    dtype: torch.dtype,
    device: torch.device | str,
    use_safetensors: bool | None,
    *,
    kind: Kind,
    vision_tower: str | None,
    tower_dtype: torch.dtype | None,
    decoder: bool,
) -> tuple:
    """(tokenizer, model, image processor) of a LLaVA in `folder`, or of what is there on top of
    `base`; values: of its config. decoder: whether the layers of the decoder are loaded; the rest
    is as in `load_pretrained_model`."""
    config_class, model_class = FAMILIES[kind.family]
    config = model_config(config_class, model_class, folder, values, backend)
    set_vision_tower(config, vision_tower, base)
    tokenizer = load_tokenizer(base or folder, config, fast=is_fast(base or folder, kind))
    model, filler = build_empty(
        model_class,
        config,
        dtype,
        device,
        decoder=decoder,
        use_safetensors=use_safetensors,
        rename=name_here,
        tower_dtype=tower_dtype,
    )
    check_tower_width(model)
    fill_llava(filler, folder, base, kind)
    load_tower(model, filler, tower_dtype or dtype, device)
    add_image_tokens(model, tokenizer)
    return tokenizer, model, model.get_vision_tower().image_processor


def set_vision_tower(config, override: str | None, base: str | None) -> None:
    """Settles which tower the config names; ValueError when it names none."""
    if override:
        config.mm_vision_tower = os.path.abspath(override) if os.path.isdir(override) else override
    name = getattr(config, "mm_vision_tower", None)
    if not name:
        raise ValueError(
            f"{config._name_or_path} names no vision tower (mm_vision_tower in config.json), so it "
            "cannot see images; pass vision_tower=PATH (--vision-tower) or another checkpoint"
        )
    # A projector or adapter folder may have been moved away from the tower beside its base.
    if base and not tower_beside(name, config._name_or_path):
        config.mm_vision_tower = tower_beside(name, base) or name


def check_tower_width(model: ModelPart) -> None:
    """Raises ValueError when the projector was made for features of another tower."""
    tower, config = model.get_vision_tower(), model.config
    if tower.hidden_size != config.mm_hidden_size:
        raise ValueError(
            f"the vision tower {tower.vision_tower_name} gives features of width "
            f"{tower.hidden_size}, {config._name_or_path} needs {config.mm_hidden_size} "
            "(mm_hidden_size): it was trained with another tower"
        )


def fill_llava(filler: Filler, folder: str, base: str | None, kind: Kind) -> None:
    """Weights of a full checkpoint, or of a base with a projector or an adapter on top."""
    if base is None:
        filler.add_folder(folder)
        return filler.finish(folder)
    if kind.delta == "lora":
        trained = clean_trainable_names(read_tensors(folder, NON_LORA))
    else:
        # The published loader rounds the projector through half precision, whatever the dtype.
        path = required(projector_file(folder), f"{folder} holds no projector")
        trained = {name: tensor.half() for name, tensor in read_file(path).items()}
    for name, tensor in trained.items():
        filler.add(name, tensor, folder)
    filler.add_folder(base, fit=True)
    filler.finish(f"{folder} with {base}")
    if kind.delta == "lora":
        merge_lora(filler.model, folder, name_here, filler.elsewhere)


def load_tower(model: ModelPart, filler: Filler, dtype: torch.dtype, device) -> None:
    """Readies the vision tower.

    Its weights come from the checkpoint when it was trained along (`unfreeze_mm_vision_tower`) and
    saved with the model, else from the tower's own folder.
    """
    tower = model.get_vision_tower()
    lacking = [name for name in filler.missing() if name.startswith(TOWER_PREFIX)]
    if any(name.startswith(TOWER_PREFIX) for name in filler.filled):
        if lacking:
            raise ValueError(
                f"the checkpoint holds part of a vision tower only, {lacking[0]} is missing"
            )
    elif lacking:
        tower.is_loaded = False  # built for weights that the checkpoint turned out not to have
    tower.load_model(torch_dtype=dtype)
    tower.to(device=device, dtype=dtype)


def load_plain(
    folder: str,
    base: str | None,
    backend: str,
    dtype: torch.dtype,
    device: torch.device | str,
    use_safetensors: bool | None,
) -> tuple:
    """(tokenizer, model, None) of a model without images; with `base` the LoRA adapter in `folder`
    is merged into that."""
    source = base or folder
    values = earlier_words(read_config(source))
    values = check_config(values, config_path(source, None), plain=True)
    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{source} is a {shown(kind)} model, which is not supported; {SUPPORTED}")
    with one_sentence(f"{source} describes no model"):
        config = CONFIG_MAPPING[kind].from_dict(values)
        with init_empty_weights(), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=backend, trust_remote_code=False
            )
    model.config.torch_dtype = dtype
    filler = Filler(model, dtype, device, use_safetensors)
    filler.add_folder(source)
    filler.finish(source)
    if base:
        merge_lora(model, folder)
    tokenizer = load_tokenizer(source, model.config, fast=has_json_alone(source))
    return tokenizer, model, None


def load_tokenizer(folder: str, config, fast: bool = False):
    """The tokenizer in `folder`, without a look at the network. ValueError when it is damaged, or
    has so many more tokens than the model of `config` that it belongs to another one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=fast, trust_remote_code=False)
        count, ids = len(tokenizer), tokenizer("What is this?").input_ids
    except Exception as error:  # tokenizers of damaged files fail in every way there is
        hint = OTHER_FILES.format("tokenizer.model")
        raise ValueError(
            f"no tokenizer can be loaded from {folder}: {first_line(error)}; {hint}"
        ) from error
    rows = config.vocab_size
    highest = max([count - 1, *tokenizer.get_added_vocab().values(), *ids])
    if highest >= rows + MAX_NEW_TOKENS_IN_VOCABULARY:
        raise ValueError(
            f"the tokenizer in {folder} has {highest + 1} tokens, the model {rows}: it belongs to "
            "another model"
        )
    return tokenizer


def is_fast(folder: str, kind: Kind) -> bool:
    """Whether a LLaVA's tokenizer is read from tokenizer.json, or made into that form: as
    published, for Mistral; and where that is the only file there is.

    Not a tokenizer.model with `legacy: false`, which that form reads in another way (it puts a
    space behind marks) than the model was trained with.
    """
    if kind.family != "mistral":
        return has_json_alone(folder)
    settings = os.path.join(folder, "tokenizer_config.json")
    legacy = not os.path.isfile(settings) or read_json(settings).get("legacy") is not False
    return legacy or not os.path.isfile(os.path.join(folder, "tokenizer.model"))


def has_json_alone(folder: str) -> bool:
    """Whether tokenizer.json is the only vocabulary in a folder."""
    files = ("tokenizer.model", "vocab.json", "tokenizer.json")
    model, vocabulary, whole = (os.path.isfile(os.path.join(folder, name)) for name in files)
    return whole and not (model or vocabulary)


def add_image_tokens(model: ModelPart, tokenizer) -> None:
    """Adds the marker tokens the config asks for and makes the vocabulary fit the tokenizer.

    A `padded_vocabulary` keeps the rows that it has beyond those of the tokenizer.
    """
    if getattr(model.config, "mm_use_im_patch_token", True):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(model.config, "mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    rows = model.get_input_embeddings().num_embeddings
    padded = getattr(model.config, "padded_vocabulary", False)
    if len(tokenizer) > rows or len(tokenizer) < rows and not padded:
        model.resize_token_embeddings(len(tokenizer))


def load_generation_config(folder: str) -> GenerationConfig | None:
    """The checkpoint's own defaults of `generate`; None where it has none."""
    path = os.path.join(folder, "generation_config.json")
    if not os.path.isfile(path):
        return None
    values = read_json(path)
    check_config(values, path, plain=True)
    with one_sentence(f"{path} is no generation config"):
        made = GenerationConfig.from_dict(values)  # from_pretrained takes no byte-order mark
        made._original_object_hash = hash(made)  # as it does; `generate` asks for it
        return made
