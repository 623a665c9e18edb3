"""Faster than the models as they come: levers on modules of other people's packages.

`precision=exact` pulls those that change nothing but the order of sums, `balanced` and `fast` also those that compute
in bfloat16. A lever knows the module that it is for by its class and shape. One that rewrites a layer tries itself out
on it when a model is loaded, and leaves it alone, with a line in the log, if something else would come out.
"""
