"""Who samples responses: a model in this process, or whatever else keeps the protocol."""

from salsa.runtime.sampler.local import LocalSampler, Sampler

__all__ = ["LocalSampler", "Sampler"]
