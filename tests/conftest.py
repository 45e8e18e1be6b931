"""Settings every test shares."""

import hypothesis

# The first example of a shape compiles, so time says nothing; each run draws afresh.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("suite")
