"""Operations that the deployed graphs need and no framework ships, one package each.

An op is one name with one file per framework and the same argument order in each; its package docstring is its contract. Nothing is imported
here, so that reading one facet never loads another facet's framework.
"""
