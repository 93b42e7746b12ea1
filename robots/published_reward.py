"""The progress reward as SRPO-VLA's published code computes it: siiRL's reward_score/embodied.py.

rewards.py follows the paper; docs/differences.md has the two side by side, point by point.
Left out: it keys frames by task and trial, so that the rollouts of an initial state share one
video, and the advantages are those of 0/1 rewards. Here each rollout has its own.
"""
import numpy as np

from rewards import ProgressRecord


def progress_reward(latents: np.ndarray, success: np.ndarray, task: np.ndarray,
                    alpha: float = 0.6, earlier: None = None) -> tuple[np.ndarray, ProgressRecord]:
    """As rewards.progress_reward, which see, with 0.6 whatever alpha is and other fallbacks:

    no_cluster        the mean of the successes is the centre
    equal_distances   a single failure, or a range below 1e-6: they get 0.3
    zero_latents      rows of zeros count as missing videos and get 0, success or not

    >>> latents = np.array([[1.0], [1.2], [2.0], [3.0], [4.0]])
    >>> reward, record = progress_reward(latents, np.array([1, 1, 0, 0, 0]), np.array([7] * 5))
    >>> print(reward.round(3), record.distances.round(2), record.fallbacks)
    [1.    1.    0.596 0.3   0.004] [nan nan 0.9 1.9 2.9] {7: ['no_cluster']}
    """
    from scipy.spatial.distance import cdist
    h, success, task = np.asarray(latents, float), np.asarray(success, bool), np.asarray(task)
    missing = ~h.any(1)
    reward, record = np.where(success & ~missing, 1.0, 0.0), ProgressRecord(np.full(len(h), np.nan))
    for name in np.unique(task).tolist():
        there = (task == name) & ~missing
        won, lost = np.flatnonzero(there & success), np.flatnonzero(there & ~success)
        words = ["zero_latents"] if missing[task == name].any() else []
        labels = cluster(h[won])
        # code: the standardised centres mapped back, which is the same
        centres = [h[won[labels == c]].mean(0) for c in np.unique(labels[labels >= 0])]
        record.clusters[name], record.noise[name] = len(centres), int((labels < 0).sum())
        if len(lost) and not len(won):
            words.append("no_success")
        elif len(lost):
            if not centres:
                words.append("single_success" if len(won) == 1 else "no_cluster")
                centres = [h[won].mean(0)]
            d = record.distances[lost] = cdist(h[lost], centres).min(1)
            scaled = np.full_like(d, 0.5)
            if (spread := d.max() - d.min()) < 1e-6:
                words.append("equal_distances")
            else:
                scaled = (d - d.min()) / spread
            reward[lost] = 0.6 / (1 + np.exp(-10 * (0.5 - scaled)))
        if words:
            record.fallbacks[name] = words
    return reward, record


def cluster(successes: np.ndarray) -> np.ndarray:
    """Labels (n,), -1 for noise, of success latents (n, D). Standardised points are about sqrt(2 D)
    apart, 53 in V-JEPA 2's 1408 dimensions: nothing ever clusters there at eps = 0.5."""
    from sklearn.cluster import DBSCAN
    from sklearn.preprocessing import StandardScaler
    if len(successes) < 2:
        return np.full(len(successes), -1)
    return DBSCAN(eps=0.5, min_samples=2).fit_predict(StandardScaler().fit_transform(successes))
