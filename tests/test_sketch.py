"""First look."""
import torch
from hf_unlearn.linalg import eigen
from hf_unlearn.sketch import *
def test_x():
    g=torch.Generator().manual_seed(0)
    X=torch.randn(200,50,dtype=torch.float64,generator=g)*0.8**torch.arange(50)
    G=X.T@X/200
    for r in (5,10,20,40,49):
        p=eigen(sketch_of(G,r)); e=eigen(G)
        print(r,p.missed_share,p.negative_share,(p.vectors_II@torch.diag(p.values_I)@p.vectors_II.T-G).norm()/G.trace(), p.rank(.9), e.rank(.9))
    X=torch.randn(7,50,dtype=torch.float64,generator=g); G=X.T@X
    p=eigen(sketch_of(G,20)); print(p.missed_share,(p.vectors_II@torch.diag(p.values_I)@p.vectors_II.T-G).norm()/G.trace(), p.rank(1.0), p.values_I)
