from drive import *
import random
torch.manual_seed(1); random.seed(2)
def strided(rows,cols,pad,off,dt):
    buf=torch.randn(rows,cols+pad+off).to(dt); return buf, buf[:,off:off+cols]
n=0
for trial in range(60):
    wd=random.choice([torch.bfloat16,torch.float16,torch.float32])
    ud=random.choice([wd,torch.float32]); vd=random.choice([wd,wd,torch.float32])
    m=random.choice([1,3,17,64,129]); nn=random.choice([5,8,33,64,160,264])
    r=random.choice([1,2,3,8,15,16,17,24,33,64,100]); r=min(r,m,nn)
    kind=random.choice(['plain','strided','reshape','misaligned'])
    u,v=basis(m,r,ud),basis(nn,r,vd)
    if random.random()<.4:  # strided bases
        b=torch.full((m,r+random.choice([1,2,8])),float('nan'),dtype=ud); b[:,:r]=u; u=b[:,:r] 
        b=torch.full((nn,r+random.choice([1,2,8])),float('nan'),dtype=vd); b[:,:r]=v; v=b[:,:r]
    if kind=='plain': buf=torch.randn(m,nn).to(wd); view=lambda b:b
    elif kind=='strided':
        pad,off=random.choice([(8,0),(3,0),(8,8),(5,1)]); buf=torch.randn(m,nn+pad+off).to(wd); view=lambda b,off=off:b[:,off:off+nn]
    elif kind=='misaligned': buf=torch.randn(m*nn+9).to(wd); o=random.choice([1,2,5]); view=lambda b,o=o:b[o:o+m*nn]
    else:
        f=[d for d in range(1,m*nn+1) if (m*nn)%d==0 and d!=m]; a=random.choice(f); buf=torch.randn(a,m*nn//a+7).to(wd); view=lambda b,a=a:b[:,3:3+m*nn//a]
    coeff=torch.randn(random.choice([1,3]))*random.choice([1e-6,1e-2,1.]); rng=make_rng(random.randrange(2**60),random.randrange(2**32-5)); stream=random.randrange(2**32)
    w=view(buf)
    ex=w.double().contiguous().clone(); b4=ex.clone(); reference.perturb_(ex,u.double(),v.double(),coeff,rng,stream=stream)
    got=buf.clone(); perturb([(view(got),u,v,stream)],coeff,rng,processors=random.choice([1,3,50]))
    ratio_=ratio(view(got).contiguous(),ex,ex-b4)
    mask=torch.ones_like(buf,dtype=torch.bool); view(mask)[...]=False
    same=torch.equal(got[mask],buf[mask])
    got2=buf.clone(); perturb([(view(got2),u,v,stream)],coeff,rng,processors=random.choice([1,7,100]))
    det=torch.equal(got2,got)
    # stochastic decision given own sum: use fp32-rounded exact
    gs=buf.clone(); perturb([(view(gs),u,v,stream)],coeff,rng,True)
    word=words(rng,rounding_stream(stream),w.numel()).view(w.shape)
    if wd!=torch.float32:
        # bounds: the decision must match for value within +-eps of exact
        lo=round_stochastic((ex-2e-5*ex.abs().max()*0-4*(ex-b4).norm()/math.sqrt(ex.numel())*(3e-3)).float(),word,wd); 
        hi=round_stochastic((ex+4*(ex-b4).norm()/math.sqrt(ex.numel())*(3e-3)).float(),word,wd)
        g=view(gs).contiguous().double(); st=bool(((g>=lo.double().minimum(hi.double()))&(g<=hi.double().maximum(lo.double()))).float().mean()>.995)
        frac=float((lo==hi).float().mean())
    else: st=torch.equal(gs,got); frac=1
    # fold
    core=torch.randn(r,r)*1e-2; decay=random.choice([1.0,0.999,0.3])
    ef=decay*w.double()+(u.double()@core.double()@v.double().T).reshape(w.shape); gf=buf.clone(); fold(view(gf),u,v,core,decay,rng,False,stream)
    rf=ratio(view(gf).contiguous(),ef,(u.double()@core.double()@v.double().T))
    ok=ratio_[1]<1 and same and det and st and rf[1]<1.0 and torch.equal(gf[mask],buf[mask])
    n+=not ok
    print(m,nn,r,kind,str(wd)[6:],str(ud)[6:],str(vd)[6:],'%.2e %.2f'%ratio_,'fold %.2e %.2f'%rf,'same',same,'det',det,'stoch',st,'%.2f'%frac,'OK' if ok else 'FAIL',flush=True)
# many
for stoch in (False,True):
    items=[]
    for i in range(40):
        wd=random.choice([torch.bfloat16,torch.float16,torch.float32]); m=random.choice([1,3,17,64,129]); nn=random.choice([5,8,33,64,160]); r=min(random.choice([1,3,8,24,70]),m,nn)
        items.append((torch.randn(m,nn).to(wd),basis(m,r,wd),basis(nn,r,wd),i))
    coeff=torch.tensor([1e-2,-3e-3]); rng=make_rng(5,6)
    one=[(w.clone(),u,v,s) for w,u,v,s in items]; many=[(w.clone(),u,v,s) for w,u,v,s in items]
    perturb(many,coeff,rng,stoch,2)
    for it in one: perturb([it],coeff,rng,stoch)
    print('many==single',all(torch.equal(a[0],b[0]) for a,b in zip(one,many)))
print('fails',n)
