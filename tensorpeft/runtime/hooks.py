"""How an adapter holds on to a model: forward hooks, a submodule, and frozen parameters. All of it can be taken back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tensorpeft.language.errors import AdapterError

if TYPE_CHECKING:
    from tensorpeft.runtime.adapter import Adapter

PREFIX = "tensorpeft_"  # of the adapter's name among the model's submodules


class SiteHook:
    """Adds an adapter's updates to the output of one linear module."""

    def __init__(self, adapter: Adapter, path: str) -> None:
        self.adapter = adapter
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
        if not self.adapter.enabled:
            return output
        return self.adapter.update(self.path, module, args[0] if args else next(iter(named.values())), output)


class InputHook:
    """Adds an adapter's updates to the input of one linear module, where they go through its weight."""

    def __init__(self, adapter: Adapter, path: str) -> None:
        self.adapter = adapter
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not self.adapter.enabled:
            return None
        if args:
            return (self.adapter.update_input(self.path, module, args[0]), *args[1:]), named
        (name, x), *others = named.items()
        return args, {name: self.adapter.update_input(self.path, module, x), **dict(others)}


class PairHook:
    """Adds an adapter's update to the output of a convolution or an embedding."""

    def __init__(self, adapter: Adapter, path: str) -> None:
        self.adapter = adapter
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
        if not self.adapter.enabled:
            return output
        x = args[0] if args else next(iter(named.values()))
        return self.adapter.apart.added(self.path, module, x, output)


class ReplaceHook:
    """Replaces weights that the forward of a module reads, before it runs."""

    def __init__(self, adapter: Adapter, paths: list[str]) -> None:
        self.adapter = adapter
        self.paths = paths

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.adapter.enabled:
            for path in self.paths:
                self.adapter.apart.replace(path, module)


class RestoreHook:
    """Takes that back when the forward is over, be it by an error."""

    def __init__(self, adapter: Adapter, paths: list[str]) -> None:
        self.adapter = adapter
        self.paths = paths

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for path in self.paths:
            self.adapter.apart.restore(path, module)


class StartHook:
    """Tells an adapter that a forward of its model begins."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self.adapter.forget()


class EndHook:
    """Tells an adapter that a forward of its model is over."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.adapter.drop_runs()


class Attachment:
    """What attaching changed in a model. The model is no submodule of its adapter: it is held here, out of nn.Module's sight."""

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.model = model
        self.adapter = adapter
        self.handles: list[RemovableHandle] = []
        self.frozen: list[nn.Parameter] = []

    def install(self, values: Mapping[str, Tensor]) -> None:
        """Hook every site, add the adapter as a submodule, freeze the base but for what is trained of it.

        ``values`` are what the latter starts from, where it is not what it is. An error on the way takes all of it back.
        """
        try:
            self._refuse_shared()
            self.adapter.extras.attach(self.model, values)
            modules = dict(self.model.named_modules())
            for path in dict.fromkeys(site.module for site in self.adapter.sites if site.kind == "linear"):
                hook = SiteHook(self.adapter, path)
                self.handles.append(modules[path].register_forward_hook(hook, with_kwargs=True))
            for path in self.adapter.input_modules:
                ahead = InputHook(self.adapter, path)
                self.handles.append(modules[path].register_forward_pre_hook(ahead, with_kwargs=True))
            for path in self.adapter.apart.called:
                pair = PairHook(self.adapter, path)
                self.handles.append(modules[path].register_forward_hook(pair, with_kwargs=True))
            for path, weights in self.adapter.apart.read.items():
                replace, restore = ReplaceHook(self.adapter, weights), RestoreHook(self.adapter, weights)
                self.handles.append(modules[path].register_forward_pre_hook(replace))
                self.handles.append(modules[path].register_forward_hook(restore, always_call=True))
            self.handles.append(self.model.register_forward_pre_hook(StartHook(self.adapter)))
            self.handles.append(self.model.register_forward_hook(EndHook(self.adapter)))
            self.model.add_module(PREFIX + self.adapter.name, self.adapter)
            self.tell_who_is_alone()
            own = {id(p) for adapter in adapters(self.model) for p in adapter.parameters()}
            self.frozen = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
            for parameter in self.frozen:
                parameter.requires_grad_(False)
        except BaseException:
            self.remove()
            raise

    def tell_who_is_alone(self) -> None:
        """Let an adapter have what the base computes, if no other one changes that, and the base's modules tell their biases."""
        found = adapters(self.model)
        active = [adapter for adapter in found if adapter.enabled or adapter.merged is not None]
        for adapter in found:
            modules = (self.model.get_submodule(path) for path in adapter.product_modules)
            others = [other for other in active if other is not adapter]
            adapter.set_alone(not others and all(hasattr(module, "bias") for module in modules))

    def _refuse_shared(self) -> None:
        for other in adapters(self.model):
            for path in self.adapter.extras.paths:
                if path in other.extras.paths:
                    raise AdapterError(f"`{path}` is trained by adapter `{other.name}` already; detach that one first")

    def remove(self, *, keep_merged: bool = False) -> None:
        """Take everything back. What was frozen thaws, unless another adapter is still attached, which then keeps it."""
        own = list(self.adapter.extras.parameters())
        self.adapter.extras.detach(keep=keep_merged)
        own = [parameter for parameter in own if parameter.requires_grad]
        self.frozen += own
        for handle in self.handles:
            handle.remove()
        self.model._modules.pop(PREFIX + self.adapter.name, None)
        self.tell_who_is_alone()
        others = [other.attachment for other in adapters(self.model) if other.attachment is not None]
        if others:
            others[0].frozen += self.frozen
            for parameter in own:
                parameter.requires_grad_(False)
        else:
            for parameter in self.frozen:
                parameter.requires_grad_(True)


def adapters(model: nn.Module) -> list[Adapter]:
    """The adapters attached to a model, in the order in which they were attached."""
    children: Iterator[Any] = model.children()
    return [child for child in children if isinstance(getattr(child, "attachment", None), Attachment)]
