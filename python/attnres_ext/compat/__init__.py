"""The signatures people already call, with our operators underneath: one module per project.

Same arguments, same results, same points at which numbers are rounded; what differs is said in each
module. Changing the import is all it takes.
"""

from attnres_ext.compat.fla import fused_attnres
from attnres_ext.compat.liger import LigerAttnRes, liger_attn_res
from attnres_ext.compat.vllm import attn_res

__all__ = ["LigerAttnRes", "attn_res", "fused_attnres", "liger_attn_res"]
