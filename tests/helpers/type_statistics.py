"""Token statistics of given types: how often each was seen and measured, and its mean divergence."""

from trl_opd import RockSet, TokenStats

MEASURE = {"divergence": "reverse_kl", "temperature": 1.0, "student": "last", "teacher": "a/teacher"}


def stats_of(*types: tuple[int, int, float], measure: dict = MEASURE) -> TokenStats:
    """Return statistics of types given as (seen, count, mean divergence)."""
    stats = TokenStats(len(types), measure)
    for id, (seen, count, mean) in enumerate(types):
        stats.seen[id], stats.count[id], stats.kl_sum[id] = seen, count, mean * count
    return stats


def measured(*types: tuple[int, float], measure: dict = MEASURE) -> TokenStats:
    """Return statistics of types given as (seen, mean divergence), measured everywhere."""
    return stats_of(*((seen, seen, mean) for seen, mean in types), measure=measure)


def counted(*seen: int) -> TokenStats:
    return measured(*((count, 1.0) for count in seen))


def ids(rock_set: RockSet) -> list[int]:
    return [rock.id for rock in rock_set.rocks]
