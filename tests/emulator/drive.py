import ctypes, math, sys, itertools, torch, numpy as np
from subzero_kernels.backends import reference
from subzero_kernels.rng import make_rng, round_stochastic, words, rounding_stream
from op_cases import assert_close, c_of
lib=ctypes.CDLL(sys.argv.pop(1)+'/libemu.so')
DT={torch.float32:0,torch.bfloat16:1,torch.float16:2}
def mat(t,rows=False):
    if t.is_contiguous() and not rows: return [t.data_ptr(),1,t.numel(),t.numel(),DT[t.dtype]]
    return [t.data_ptr(),t.shape[0],t.shape[1],t.stride(0) if t.shape[0]>1 else t.shape[1],DT[t.dtype]]
def flat(items):
    a=np.array([mat(w)+mat(u,True)+mat(v,True)+[s] for w,u,v,s in items],dtype=np.int64)
    return a
def perturb(items,coeff,rng,stoch=False,processors=3):
    a=flat(items)
    r=lib.perturb(ctypes.c_void_p(a.ctypes.data),ctypes.c_int64(len(items)),ctypes.c_void_p(coeff.data_ptr()),ctypes.c_int64(coeff.numel()),ctypes.c_void_p(rng.data_ptr()),int(stoch),processors)
    assert r==0
def fold(w,u,v,core,decay,rng,stoch,stream,processors=3):
    a=flat([(w,u,v,stream)])
    r=lib.fold(ctypes.c_void_p(a.ctypes.data),ctypes.c_void_p(core.data_ptr()),ctypes.c_double(decay),ctypes.c_void_p(rng.data_ptr()),int(stoch),processors)
    assert r==0
def basis(n,r,dt): return torch.linalg.qr(torch.randn(n,r,dtype=torch.float64))[0].to(dt).contiguous()
def exact(w,u,v,coeff,rng,stream):
    d=w.double().contiguous().clone(); before=d.clone()
    reference.perturb_(d,u.double(),v.double(),coeff,rng,stream=stream)
    return d,d-before
def ratio(got,ex,added):
    store=(ex.to(got.dtype).double()-ex).norm(); err=(got.double()-ex).norm()
    # err in units of added after removing store (quadrature)
    return float(((err**2-store**2).clamp_min(0)).sqrt()/added.norm()), float(err/(1.1*store+c_of(got.dtype)*added.norm()))
if __name__=='__main__':
    torch.manual_seed(0)
    fails=0
    # (m,n,r)
    cases=[(1,1,1),(7,129,7),(129,7,3),(129,1151,16),(131,1,1),(96,64,33),(256,256,64),(5,64,3),(130,200,24),(200,136,128),(300,264,256),(128,128,100),(17,1024,8),(260,257,160)]
    if len(sys.argv)>1: cases=[tuple(map(int,a.split(','))) for a in sys.argv[1:]]
    for (m,n,r) in cases:
        for wd,bd in [(torch.bfloat16,torch.bfloat16),(torch.float16,torch.float16),(torch.float32,torch.float32),(torch.bfloat16,torch.float32),(torch.float16,torch.float32)]:
            u,v=basis(m,r,bd),basis(n,r,bd)
            K=2 if r!=8 else 40
            coeff=torch.randn(K)*1e-2; rng=make_rng(11,5)
            w=torch.randn(m,n).to(wd)
            ex,added=exact(w,u,v,coeff,rng,77)
            got=w.clone(); perturb([(got,u,v,77)],coeff,rng)
            a,b=ratio(got,ex,added)
            # zero w: pure added
            z=torch.zeros(m,n,dtype=wd); ez,_=exact(z,u,v,coeff,rng,77); gz=z.clone(); perturb([(gz,u,v,77)],coeff,rng)
            c,d=ratio(gz,ez,added)
            # pure error vs unrounded: relative for fp32
            pure=float((gz.double()-ez).norm()/added.norm())
            # stochastic
            gs=w.clone(); perturb([(gs,u,v,77)],coeff,rng,True)
            ok='OK' if b<1 and d<1 else 'FAIL'
            gap=(gs.double()-ex).abs().max()
            print(m,n,r,str(wd)[6:],str(bd)[6:],f'err/added {a:.2e} bound {b:.2f} zero: {c:.2e} {d:.2f} pure {pure:.2e} stoch maxdev {float(gap):.3g}',ok,flush=True)
            fails+=ok!='OK'
    print('fails',fails)
