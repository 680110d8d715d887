"""Routed bundles: one base, the compressed changes of many experts, and a router that needs no data.

    manifest  what a bundle holds            build    from experts to a folder
    store     factors, computed once         verify   is it what it says
    factors   groups of tasks                grouped  one pass, every sample with its group's weights
    opening   load_bundle -> MassModel       local    weights that one thread sees
    classes   experts that are classes of    replay   their code, run on what the shared network said
              transformers                   answer   whose head answers
    present   what is an expert's own        expert   one compressed expert as a model that any method can read
    texts     what people write, as inputs   classifier   the face of a pipeline
    kinds     which kind is made by what     masked   masks of one change, made, and masks   used
    around    experts around a merged model  arrow    shares of all experts, for a token or an input

Usable by itself: nothing here knows of recipes, plans or runs, and what serves a bundle imports none of these.
"""

from mergetool.bundle.manifest import is_bundle as is_bundle
