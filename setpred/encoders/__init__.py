"""Set encoders: a set and its mask become a vector."""

from setpred.encoders.attention import AttentionEncoder
from setpred.encoders.base import SetEncoder
from setpred.encoders.check import EncoderCheck, check_encoder
from setpred.encoders.fspool import FSPool, FSUnpool
from setpred.encoders.pooled import PooledEncoder
from setpred.encoders.relation import RelationEncoder

__all__ = [
    "SetEncoder",
    "FSPool",
    "FSUnpool",
    "PooledEncoder",
    "RelationEncoder",
    "AttentionEncoder",
    "EncoderCheck",
    "check_encoder",
]
