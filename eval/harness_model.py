"""lm-eval's model `marlin`: full-precision and quantized directories, or a base with an original Marlin state dict."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.errors import InputError, MarlinGPTQError
from marlin_gptq.eval.original_checkpoint import load_original
from marlin_gptq.kernel import why_not
from marlin_gptq.modeling.linear import MarlinLinear
from marlin_gptq.text_files import whole_characters

CPU_BATCH = 8


class OutOfMemory(MarlinGPTQError):
    """A batch that the GPU does not hold; says which does."""


@functools.cache
def marlin_model_class() -> type:
    """The class that lm-eval knows as `marlin`, registered by the first call. Its arguments are those of HFLM and:

    marlin_checkpoint  a state dict of the original Marlin repository; `pretrained` is then its base model.
    truncate           False refuses a prompt longer than the context instead of cutting its beginning.
    """
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    class MarlinLM(HFLM):
        def __init__(
            self,
            pretrained: str,
            marlin_checkpoint: str | None = None,
            truncate: bool | str = True,
            device: str | None = None,
            batch_size: int | str | None = "auto",
            **kwargs: Any,
        ) -> None:
            self.marlin_checkpoint = marlin_checkpoint
            self.truncate = str(truncate).lower() not in ("false", "0", "no")
            self.truncated_prompts = 0
            self.progress: Any = None  # harness.py puts its counter here: then lm-eval's own bars are off
            self._probing = False
            self._inputs: Tensor | None = None
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            if str(batch_size).startswith("auto") and not device.startswith("cuda"):
                batch_size = CPU_BATCH  # a host does not say that memory is short, it dies
            super().__init__(pretrained=pretrained, device=device, batch_size=batch_size, **kwargs)
            self.require_fitting_tokenizer()

        def _create_model(self, pretrained: str, **kwargs: Any) -> None:
            dtype = kwargs.get("dtype") or "auto"
            on_cpu = self.device.type == "cpu"
            if self.marlin_checkpoint:
                self._model: Any = load_original(Path(pretrained), Path(self.marlin_checkpoint))
                quantized = True
            else:
                quantized = getattr(self.config, "quantization_config", None) is not None
                if on_cpu and not quantized and dtype == "auto":
                    kwargs["dtype"] = "float32"
                with warnings.catch_warnings():  # HFLM hands transformers the settings that it has already
                    warnings.filterwarnings("ignore", message="You passed `quantization_config`")
                    super()._create_model(pretrained, **kwargs)
                if quantized and not any(isinstance(module, MarlinLinear) for module in self._model.modules()):
                    raise InputError(
                        f"{pretrained}: its quantization_config is not marlin-gptq's; lm-eval's own models "
                        "(marlin-eval lm-eval -- --model hf ...) may know it"
                    )
            if on_cpu and quantized and dtype in ("auto", "float32"):
                compute_in_float32(self._model)
            self._model.to(self.device)

        def require_fitting_tokenizer(self) -> None:
            """InputError for a tokenizer with tokens that the model has no embedding for."""
            rows = self.model.get_input_embeddings().weight.shape[0]
            pad = self.tokenizer.pad_token  # lm-eval adds one to a tokenizer that has nothing to pad with
            largest = max(index for token, index in self.tokenizer.get_vocab().items() if token != pad)
            if largest >= rows:
                raise InputError(
                    f"tokenizer: its largest token is {largest}, the model's vocabulary has {rows}; "
                    "the tokenizer in the directory belongs to another model"
                )

        def kernel_name(self) -> str:
            """What computes the quantized linears, for reports."""
            return kernel_name(self.model, self.device)

        @property
        def eot_token_id(self) -> Any:
            """The tokenizer's, or the model's where the tokenizer has none."""
            own = super().eot_token_id
            other = self.model.config.eos_token_id
            return own if own is not None else other[0] if isinstance(other, list) else other

        @property
        def prefix_token_id(self) -> Any:
            """What stands before a text that is scored from its first token; None without bos and eos."""
            own = super().prefix_token_id
            return own if own is not None else self.eot_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            if add_special_tokens is None and self.prefix_token_id is None:  # which lm-eval would decode
                add_special_tokens = self.add_bos_token is not False
            return super().tok_encode(whole_characters(string), add_special_tokens, **kwargs)

        def tok_decode(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
            return None if tokens is None else super().tok_decode(tokens, *args, **kwargs)

        def _require_prefix(self) -> None:
            if self.prefix_token_id is None:
                raise InputError(
                    "tokenizer: has neither a bos nor an eos token to put before a text that is scored from its first "
                    "token, and config.json names none; this task does not fit this model"
                )

        def _start(self, requests: list[Any]) -> None:
            if self.progress is not None:
                self.progress.start(len(requests))

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            self._start(requests)
            if any(request.args[0] == "" for request in requests):
                self._require_prefix()
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.progress is not None)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            self._start(requests)
            return super().generate_until(requests, disable_tqdm=disable_tqdm or self.progress is not None)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            self._start(requests)
            self._require_prefix()
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or self.progress is not None)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            too_long = {}  # a question's choices share its prompt
            for _, context, continuation in requests:
                if len(continuation) > self.max_length:
                    raise InputError(
                        f"answer: one has {len(continuation)} tokens, the model's context holds {self.max_length}; "
                        "this task does not fit this model"
                    )
                if len(context) + len(continuation) > self.max_length + 1:
                    too_long[tuple(context)] = len(context) + len(continuation) - 1
            for length in too_long.values():
                self._too_long(length, self.max_length)
            quiet = disable_tqdm or self.progress is not None
            try:
                return super()._loglikelihood_tokens(requests, disable_tqdm=quiet, override_bs=override_bs)
            except torch.OutOfMemoryError:  # beside the forward: the log-probabilities of a whole batch
                inputs, self._inputs = self._inputs, None
            if inputs is None:
                raise OutOfMemory("out of GPU memory before the first batch; use a larger GPU or --device cpu")
            raise self._out_of_memory(inputs, lambda size: super(MarlinLM, self)._model_call(inputs[:size]))

        def tok_batch_encode(
            self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> Any:  # fmt: skip
            texts = [whole_characters(string) for string in strings]
            ids, mask = super().tok_batch_encode(texts, padding_side=padding_side, truncation=truncation)
            ids = ids.masked_fill(mask == 0, 0)  # the model may have no embedding for the token padded with
            if left_truncate_len and ids.shape[1] > left_truncate_len:
                for length in mask.sum(1).tolist():
                    if length > left_truncate_len:
                        self._too_long(length, left_truncate_len)
                ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
            return ids, mask

        def _too_long(self, length: int, room: int) -> None:
            if not self.truncate:
                raise InputError(
                    f"prompt: one has {length} tokens, the model's context leaves room for {room}; use fewer "
                    "--num-fewshot, or let its beginning be cut off (without --refuse-truncation)"
                )
            self.truncated_prompts += 1

        def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
            self._probing = True  # here running out of memory is the method
            try:
                return super()._detect_batch_size(requests, pos)
            finally:
                self._probing = False

        def _model_call(self, inps: Tensor, **kwargs: Any) -> Tensor:
            self._inputs = inps
            try:
                return super()._model_call(inps, **kwargs)
            except torch.OutOfMemoryError:
                if self._probing:
                    raise
            raise self._out_of_memory(inps, lambda size: super(MarlinLM, self)._model_call(inps[:size]))

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Any:
            try:
                return super()._model_generate(context, max_length, stop, **kwargs)
            except torch.OutOfMemoryError:
                pass

            def again(size: int) -> None:
                cut = {key: value[:size] if isinstance(value, Tensor) else value for key, value in kwargs.items()}
                super(MarlinLM, self)._model_generate(context[:size], max_length, stop, **cut)

            raise self._out_of_memory(context, again)

        def _out_of_memory(self, inputs: Tensor, run: Callable[[int], Any]) -> OutOfMemory:
            """The error to raise: tries 1/2, 1/4, … of the batch and names the first size that runs."""
            batch, length = inputs.shape
            sentence = f"out of GPU memory: {batch} sequences of {length} tokens do not fit"
            size = batch // 2
            while size:
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                try:
                    answer = run(size)
                    if isinstance(answer, Tensor):
                        torch.log_softmax(answer, dim=-1)
                    return OutOfMemory(f"{sentence}, {size} would: use --batch-size {size} or auto")
                except torch.OutOfMemoryError:
                    size //= 2
            return OutOfMemory(f"{sentence}, nor does one; use a GPU with more memory or --device cpu")

    register_model("marlin")(MarlinLM)
    return MarlinLM


def compute_in_float32(model: nn.Module) -> None:
    """As marlin-eval perplexity computes on a CPU: everything but codes and scales in float32.

    The dequantized weights are kept, 8 times the packed size, where they leave half of the free memory.
    """
    layers = [module for module in model.modules() if isinstance(module, MarlinLinear)]
    for module in model.modules():
        if isinstance(module, MarlinLinear):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    hold = sum(4 * layer.in_features * layer.out_features for layer in layers) < free // 2
    for layer in layers:
        layer.hold_dense(hold)


def kernel_name(model: nn.Module, device: torch.device) -> str:
    """What computes the quantized linears of a whole model, in the words of BlockStream.kernel_name."""
    if not any(isinstance(module, MarlinLinear) for module in model.modules()):
        return "full precision (no quantized layers)"
    if device.type != "cuda":
        return f"reference path in plain torch (device {device.type})"
    index = torch.cuda.current_device() if device.index is None else device.index
    reason = why_not(index)
    if reason:
        return f"reference path in plain torch ({reason})"
    major, minor = torch.cuda.get_device_capability(index)
    return f"CUDA kernel (sm_{major}{minor}, {torch.cuda.get_device_name(index)})"
