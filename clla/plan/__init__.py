"""From statistics and a budget to a plan: layer groups, ranks and bits."""
