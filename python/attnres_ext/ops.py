from attnres_ext.reference import (accumulate_depth_attention, depth_attention, inter_block_attention, merge_partial)
