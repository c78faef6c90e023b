"""The compiled core, and all that calls it: no other package imports ``snnlstm._C``.

:mod:`~snnlstm.native.autograd` is the way in; :mod:`~snnlstm.native.kernels` finds the half of the
core for a device.
"""
