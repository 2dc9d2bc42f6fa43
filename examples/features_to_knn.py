"""Encoder to features to k-NN: python examples/features_to_knn.py RUN TRAIN TEST."""

import sys

import strata

encoder = strata.load_encoder(sys.argv[1])
train, test = (strata.extract_features(encoder, s, num_clips=2) for s in sys.argv[2:4])
print(f"k-NN Top-1 {strata.knn(train, test):.1%}")
print(f"retrieval R@1 {strata.retrieval(train, test)['R@1']:.1%}")
print(f"linear probe Top-1 {strata.linear_probe(train, test, epochs=20).accuracy.top1:.1%}")
