"""Runtime patches that make third-party models faster.

`precision=exact` applies those that change nothing but the order of summation; `balanced` and `fast` add those that
compute in bfloat16. A patch recognizes the modules it is for by class name and shape. One that rewrites a layer is
first run beside the original on random input when a model is loaded; if the outputs differ, the layer keeps its own
code and a warning is logged.
"""
