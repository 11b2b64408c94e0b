"""Decoders: a vector, or tokens, become a set and its mask."""

from setpred.decoders.diagnosis import Diagnosis
from setpred.decoders.dspn import DSPNDecoder
from setpred.decoders.lstm import LSTMDecoder
from setpred.decoders.mlp import MLPDecoder
from setpred.decoders.slot import SlotDecoder
from setpred.decoders.transformer import TransformerDecoder

__all__ = ["DSPNDecoder", "Diagnosis", "MLPDecoder", "LSTMDecoder", "TransformerDecoder", "SlotDecoder"]
