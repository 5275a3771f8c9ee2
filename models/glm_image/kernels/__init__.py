"""Triton kernels of the planner's decode step on CUDA, and the same arithmetic in torch (`reference`).

Every result is a function of its own row, so that it has the same bits in any batch. Grids and arguments are static,
sizes that change are read from device memory: a CUDA graph can hold them all.

Modules with kernels import Triton, which CPU installs lack: only the code that chooses kernels imports them.
"""
