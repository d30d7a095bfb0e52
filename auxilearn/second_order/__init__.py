"""Fast products with second derivatives. The algorithm does not depend on how they are computed:
skip this folder at first reading."""
