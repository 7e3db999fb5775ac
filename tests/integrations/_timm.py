"""Stand-ins for the parts of timm that flatmin touches, by the source of 1.0.31 (Apache 2.0).

torchvision, without which timm cannot be imported, has no build for the torch that the tests run with. The names,
arguments, order of calls and odd habits are timm's; what flatmin does not touch is left out.
"""

import copy
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader


@dataclass(frozen=True)
class OptimInfo:
    name: str
    opt_class: Any
    description: str = ""
    has_eps: bool = True
    has_momentum: bool = False
    has_betas: bool = False
    num_betas: int = 2
    second_order: bool = False
    defaults: dict | None = None


class OptimizerRegistry:
    def __init__(self):
        self._optimizers = {}
        self.warnings = []

    def register(self, info):
        name = info.name.lower()
        if name in self._optimizers:
            self.warnings.append(f"Optimizer {name} already registered, overwriting")
        self._optimizers[name] = info

    def list_optimizers(self, filter="", exclude_filters=None, with_description=False):
        return sorted(name for name in self._optimizers if not filter or name == filter)

    def get_optimizer_info(self, name):
        name = name.lower()
        if name not in self._optimizers:
            raise ValueError(f"Optimizer {name} not found in registry")
        return self._optimizers[name]

    def create_optimizer(
        self, model_or_params, opt, lr=None, weight_decay=0.0, momentum=0.9, foreach=None, **kwargs
    ):  # layer decay and fallbacks left out
        if isinstance(model_or_params, nn.Module):
            named = [(name, p) for name, p in model_or_params.named_parameters() if p.requires_grad]
            decay = [p for name, p in named if p.ndim > 1 and not name.endswith(".bias")]
            rest = [p for name, p in named if not (p.ndim > 1 and not name.endswith(".bias"))]
            params = [{"params": rest, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]
            weight_decay = 0.0
        else:
            params = model_or_params
        opt_split = opt.lower().split("_")
        opt_name = opt_split[-1]
        use_lookahead = opt_split[0] == "lookahead" if len(opt_split) > 1 else False
        opt_info = self.get_optimizer_info(opt_name)
        opt_args = {"weight_decay": weight_decay, **kwargs}
        if lr is not None:
            opt_args["lr"] = lr
        if opt_info.defaults:
            for k, v in opt_info.defaults.items():
                opt_args.setdefault(k, v)
        if opt_info.has_momentum:
            opt_args.setdefault("momentum", momentum)
        if not opt_info.has_eps:
            opt_args.pop("eps", None)
        if not opt_info.has_betas:
            opt_args.pop("betas", None)
        if foreach is not None:
            opt_args.setdefault("foreach", foreach)
        opt_class = opt_info.opt_class
        optimizer = opt_class(params, **opt_args)
        assert not use_lookahead
        return optimizer


default_registry = OptimizerRegistry()
for each in (
    OptimInfo("sgd", torch.optim.SGD, has_eps=False, has_momentum=True, defaults={"nesterov": True}),
    OptimInfo("momentum", torch.optim.SGD, has_eps=False, has_momentum=True, defaults={"nesterov": False}),
    OptimInfo("adamw", torch.optim.AdamW, has_betas=True),
    OptimInfo("rmsprop", torch.optim.RMSprop, has_momentum=True, defaults={"alpha": 0.9}),
):
    default_registry.register(each)


def create_optimizer_v2(
    model_or_params, opt="sgd", lr=None, weight_decay=0.0, momentum=0.9, foreach=None, filter_bias_and_bn=True, **kwargs
):
    return default_registry.create_optimizer(
        model_or_params, opt=opt, lr=lr, weight_decay=weight_decay, momentum=momentum, foreach=foreach, **kwargs
    )


def unwrap_model(model):
    if hasattr(model, "module"):
        return unwrap_model(model.module)
    if hasattr(model, "_orig_mod"):
        return unwrap_model(model._orig_mod)
    return model


class ModelEmaV3(nn.Module):
    def __init__(self, model, decay=0.9999, use_warmup=False, device=None):
        super().__init__()
        self.module = copy.deepcopy(model)
        self.module.eval()
        self.decay = decay
        self.device = device
        if self.device is not None and device != next(model.parameters()).device:
            self.module.to(device=device)

    def get_decay(self, step=None):
        if step is None:
            return self.decay
        return 0.0 if step - 1 <= 0 else self.decay

    @torch.no_grad()
    def update(self, model, step=None):
        decay = self.get_decay(step)
        for ema_v, model_v in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            if ema_v.is_floating_point():
                ema_v.lerp_(model_v, weight=1.0 - decay)
            else:
                ema_v.copy_(model_v)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class TrainingTask(nn.Module):
    def __init__(self, device=None, dtype=None, verbose=True):
        super().__init__()
        self.device = device if device is not None else torch.device("cpu")
        self.dtype = dtype if dtype is not None else torch.get_default_dtype()
        self.verbose = verbose

    def get_trainable_module(self, ema=False):
        if ema:
            return getattr(self, "trainable_module_ema", None)
        return getattr(self, "trainable_module", self)

    def setup_ema(self, decay=0.9999, use_warmup=False, device=None, **kwargs):
        self.trainable_module_ema = ModelEmaV3(
            self.get_trainable_module(), decay=decay, use_warmup=use_warmup, device=device, **kwargs
        )
        return self.trainable_module_ema

    def has_ema(self):
        return self.get_trainable_module(ema=True) is not None

    def update_ema(self, step=None):
        if self.has_ema():
            self.get_trainable_module(ema=True).update(unwrap_model(self.get_trainable_module()), step=step)

    def get_eval_model(self, module=None, ema=False):
        if module is None:
            eval_attr = "eval_model_ema" if ema else "eval_model"
            if hasattr(self, eval_attr):
                return getattr(self, eval_attr)
            module = self.get_trainable_module(ema=ema)
        return module

    def get_task_state(self, module=None, ema=False):
        return {}

    def load_task_state(self, state, strict=True, module=None, ema=False):
        return None

    def get_checkpoint_state(self, ema=False, unwrap_fn=unwrap_model):
        eval_model = self.get_eval_model(ema=ema)
        if eval_model is None:
            return {}
        model_key = "state_dict_ema" if ema else "state_dict"
        task_key = "task_state_ema" if ema else "task_state"
        task_state = self.get_task_state(ema=ema)
        state = {model_key: unwrap_fn(eval_model).state_dict()}
        if task_state:
            state[task_key] = task_state
        return state

    def load_checkpoint_state(self, state_dict, task_state=None, ema=False, strict=True):
        eval_model = self.get_eval_model(ema=ema)
        assert eval_model is not None
        unwrap_model(eval_model).load_state_dict(state_dict, strict=strict)
        self.load_task_state(task_state, strict=strict, ema=ema)


class ClassificationTask(TrainingTask):
    def __init__(self, model, criterion, device=None, dtype=None, verbose=True):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.trainable_module = model
        self.criterion = criterion

    def forward(self, input, target):
        output = self.trainable_module(input)
        return {"loss": self.criterion(output, target), "output": output}


class NativeScaler:
    def __init__(self, device="cuda", **options):
        self._scaler = torch.amp.GradScaler(device=device, **options)

    def __call__(self, loss, optimizer, clip_grad=None, parameters=None, need_update=True):
        self._scaler.scale(loss).backward(create_graph=False)
        if need_update:
            if clip_grad is not None:
                self._scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
            self._scaler.step(optimizer)
            self._scaler.update()


def fast_collate(batch):
    assert isinstance(batch[0], tuple)
    batch_size = len(batch)
    if isinstance(batch[0][0], np.ndarray):
        targets = torch.tensor([b[1] for b in batch], dtype=torch.int64)
        tensor = torch.zeros((batch_size, *batch[0][0].shape), dtype=torch.uint8)
        for i in range(batch_size):
            tensor[i] += torch.from_numpy(batch[i][0])
        return tensor, targets
    if isinstance(batch[0][0], torch.Tensor):
        targets = torch.tensor([b[1] for b in batch], dtype=torch.int64)
        tensor = torch.zeros((batch_size, *batch[0][0].shape), dtype=torch.uint8)
        for i in range(batch_size):
            tensor[i].copy_(batch[i][0])
        return tensor, targets
    raise AssertionError


class PrefetchLoader:
    __module__ = "timm.data.loader"

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):  # a batch behind, to overlap copies
        before = None
        for next_input, next_target in self.loader:
            next_input = next_input.to(device="cpu", non_blocking=True)
            next_target = next_target.to(device="cpu", non_blocking=True)
            next_input = next_input.to(torch.float32).sub_(0.5).div_(2)
            if before is not None:
                yield before
            before = next_input, next_target
        yield before

    def __len__(self):
        return len(self.loader)

    @property
    def sampler(self):
        return self.loader.sampler

    @property
    def dataset(self):
        return self.loader.dataset


def create_loader(dataset, input_size, batch_size, is_training=False, use_prefetcher=True, collate_fn=None):
    dataset.transform = lambda image: image
    if collate_fn is None:
        collate_fn = fast_collate if use_prefetcher else torch.utils.data.dataloader.default_collate
    loader = DataLoader(dataset, batch_size, shuffle=is_training, collate_fn=collate_fn, drop_last=is_training)
    return PrefetchLoader(loader) if use_prefetcher else loader


def modules() -> dict[str, ModuleType]:
    """The stand-ins by the names under which they are imported."""
    here = sys.modules[__name__]
    held = {
        "timm": (),
        "timm.data": ("create_loader",),
        "timm.optim": ("OptimInfo", "create_optimizer_v2"),
        "timm.optim._optim_factory": ("OptimInfo", "create_optimizer_v2", "default_registry"),
        "timm.task": ("ClassificationTask", "TrainingTask"),
        "timm.utils": ("ModelEmaV3", "NativeScaler"),
    }
    made = {}
    for name, members in held.items():
        made[name] = ModuleType(name)
        made[name].__path__ = []
        vars(made[name]).update({member: getattr(here, member) for member in members})
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(made[parent], own, made[name])
    return made
