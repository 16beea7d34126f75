"""Which differences between methods are real at this sample size, and how many seeds would settle the others."""

from svdpeft.compare.statistics.looks import levels
from svdpeft.compare.statistics.paired import Difference, Interval, differences, interval
from svdpeft.compare.statistics.standing import Standing, standings
from svdpeft.compare.statistics.two_way import Components, MeanSquares, needed, power
from svdpeft.compare.statistics.words import conclusion, sentences

__all__ = [
    "Components",
    "Difference",
    "Interval",
    "MeanSquares",
    "Standing",
    "conclusion",
    "differences",
    "interval",
    "levels",
    "needed",
    "power",
    "sentences",
    "standings",
]
