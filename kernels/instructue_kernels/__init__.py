"""Ops of instructue-feast: each has a readable reference, a memory-bounded path and one public function.

`adapter`: LayerNorm -> Linear -> GELU -> Linear over event vectors. Imports torch only.
"""
