import torch
from hesscale_lightning.curvature.registry import register_rule
tanh_backward=torch.ops.aten.tanh_backward.default
threshold=torch.ops.aten.threshold_backward.default
@register_rule("TBackward0", view=True)
def t(op):
    return lambda h: (h.t(),)
@register_rule("TanhBackward0", curved=True)
def tanh(op):
    y=op.node._saved_result
    def f(g,h):
        s=y*y
        z=torch.addcmul(h,h,s,value=-1)
        if g is not None: z.addcmul_(y,g,value=-2)
        z.addcmul_(z,s,value=-1)
        return (z,)
    return f
@register_rule("ReluBackward0")
def relu(op):
    y=op.node._saved_result
    return lambda h: (threshold(h,y,0),)
@register_rule("NllLossBackward0","MeanBackward0","SumBackward0")
def nll(op):
    return None
@register_rule("LogSoftmaxBackward0", curved=True)
def lsm(op):
    y=op.node._saved_result; d=op.node._saved_dim
    def f(g,h):
        p=y.exp()
        if h is None:
            q=torch.addcmul(p,p,p,value=-1)
            return (q.mul_(g.sum(1,keepdim=True).neg_()),)
    return f
@register_rule("MulBackward0")
def mul(op):
    a,b=op.node._saved_self,op.node._saved_other
    return lambda h: ((h*b*b) if op.needs[0] else None, (h*a*a).sum_to_size(op.input_shape(1)) if op.needs[1] else None)
