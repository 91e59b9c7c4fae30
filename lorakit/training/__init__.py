"""One exact optimiser step after another, without a word of pruning."""
