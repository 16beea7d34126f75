"""The shared SVD core: drivers, sign rule, structured cores, rotations, factor algebra."""

from svdpeft.decomposition.bands import Band
from svdpeft.decomposition.cache import damaged, svd_cache, svd_cache_until_attached, uncached
from svdpeft.decomposition.canonical import canonical, canonical_signs, fixed_numbers
from svdpeft.decomposition.clusters import kmeans
from svdpeft.decomposition.cores import band_count, band_index, random_index, scatter_core, top_index
from svdpeft.decomposition.digests import digest, has_digest
from svdpeft.decomposition.finite import all_finite
from svdpeft.decomposition.precision import full_precision
from svdpeft.decomposition.processes import own_share_first, processes
from svdpeft.decomposition.products import EXACT, Product, difference, exact_rank, recompress, truncated
from svdpeft.decomposition.rotations import (
    TERMS,
    cayley,
    cayley_neumann,
    cayley_neumann_offset,
    cayley_offset,
    skew,
    skew_count,
)
from svdpeft.decomposition.svd import (
    SVD,
    Driver,
    approximations,
    check_matrix,
    check_rank,
    decomposing_on,
    minor_svd,
    truncated_svd,
)

__all__ = [
    "EXACT",
    "SVD",
    "TERMS",
    "Band",
    "Driver",
    "Product",
    "all_finite",
    "approximations",
    "band_count",
    "band_index",
    "canonical",
    "canonical_signs",
    "cayley",
    "cayley_neumann",
    "cayley_neumann_offset",
    "cayley_offset",
    "check_matrix",
    "check_rank",
    "damaged",
    "decomposing_on",
    "difference",
    "digest",
    "exact_rank",
    "fixed_numbers",
    "full_precision",
    "has_digest",
    "kmeans",
    "minor_svd",
    "own_share_first",
    "processes",
    "random_index",
    "recompress",
    "scatter_core",
    "skew",
    "skew_count",
    "svd_cache",
    "svd_cache_until_attached",
    "top_index",
    "truncated",
    "truncated_svd",
    "uncached",
]
