"""The compiled core, and all that calls it: no other package imports ``snnlstm._C``.

:mod:`~snnlstm.native.function` runs a call, and :mod:`~snnlstm.native.backend` finds its plan.
"""
