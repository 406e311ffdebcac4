#!lua flags=allow-oom
-- seed joins what a process knows of a family into the record. The join is the
-- same in any order, and repeated changes nothing: the higher generation wins,
-- what was dropped stays dropped. mirror.go joins by the same rules.
--
-- arg: the fields of content, as they were read; f and g; stamp and the
-- registers known, as for look, whose answer this gives.
loadAll()
putMax('d', tonumber(arg.d or 0))
putMax('ff', math.max(tonumber(arg.ff or 0), number('d')))
putMax('rs', tonumber(arg.rs or 0))
for field, value in pairs(arg) do
  local id = string.match(field, '^t:(.+)')
  if id and tonumber(value) > now then bury(id, tonumber(value)) end
  local job = string.match(field, '^j:(.+)')
  if job and tonumber(value) > now then conclude(job, tonumber(value)) end
end

-- beats tells whether register a wins over b. Between two of one generation,
-- which a store that went back can have handed out twice, the id decides.
local function beats(a, b)
  if not b or a.g ~= b.g then return not b or a.g > b.g end
  if a.id ~= b.id then return a.id > b.id end
  if a.state ~= b.state then return a.state == '-' end
  if a.obtained ~= b.obtained then return a.obtained > b.obtained end
  return registered(a) > registered(b)
end

local function retired(a)
  if a.state == '+' and tombstoned(a.id) then a.state = '-' end
  return a
end

-- the record's own
prune()
each('s', function(slot, value)
  local s = retired(register(value))
  putSlot(slot, s, s.state == '+' and H['a:' .. slot] or nil)
end)
local c = grant(H.r)
if c then
  c = retired(c)
  putConsent(c, c.state == '+' and H.rt or nil)
end

-- and what comes
for field, value in pairs(arg) do
  local slot = string.match(field, '^s:(.*)')
  local s = slot and register(value)
  if s and s.ends > now and not ended(slot) and beats(s, register(H[field])) then
    s = retired(s)
    local sealed = arg['a:' .. slot]
    if s.state == '-' or sealed then
      putMax('g', s.g)
      putSlot(slot, s, s.state == '+' and sealed or nil)
    end
  end
end
local o = grant(arg.r)
if o and c and o.g == c.g and o.id == c.id then
  local known = {unknown = 0, no = 1, yes = 2}
  c.dead, c.proof = math.max(c.dead, o.dead), math.max(c.proof, o.proof)
  if known[o.rotates] > known[c.rotates] then c.rotates = o.rotates end
  c.start, c.ends = math.min(c.start, o.start), math.max(c.ends, o.ends)
  if o.origin > c.origin then c.origin = o.origin end
  if o.state == '-' then c.state = '-' end
  putConsent(c, c.state == '+' and H.rt or nil)
elseif o and (not c or o.g > c.g or o.g == c.g and o.id > c.id) and not (o.state == '+' and (not arg.rt or H['q:' .. o.id] == arg.rt)) then
  o = retired(o)
  putMax('g', o.g)
  putConsent(o, o.state == '+' and arg.rt or nil)
  put('su', int(now + settleWindow))
  if not c or c.id ~= o.id then
    put('l', nil)
    put('nc', nil)
  end
end

-- presentations of the refresh token that won
c = consent()
local p, q = words(H.p or ''), words(arg.p or '')
if p[1] and not (c and c.id == p[1]) then
  put('p', nil)
  p = {}
end
if c and c.id == q[1] then
  local turn, other = tonumber(p[4] or 0), tonumber(q[4])
  if other > turn or other == turn and arg.p > H.p then put('p', arg.p) end
end

-- failures: the latest of those that still say something
local function void(e, subject)
  return e.fence <= number('ff') or not e.stands or e.kind == 'dead' and not (c and c.id == subject)
end
local e = failure()
if e and void(e, H.ek) then
  takeFailure()
  e = nil
end
if arg.e then
  local w = words(arg.e)
  local other = {fence = tonumber(w[1]), kind = w[2], count = tonumber(w[3]), at = tonumber(w[4]), ends = tonumber(w[5])}
  other.stands = other.ends == 0 or other.ends > now
  local function whole(f) return table.concat({f.e, f.ec, f.ek, f.et}, ' ') end
  local newer = not e or other.fence > e.fence or other.fence == e.fence and whole(arg) > whole(H)
  if newer and not void(other, arg.ek) then
    putFailure(other, arg.ec, arg.ek, arg.et)
  end
end
putMax('g', math.max(tonumber(arg.g or 0), number('d')))
putMax('f', math.max(tonumber(arg.f or 0), number('d')))
prune()
commit('seed')

local out = {}
for field, value in pairs(H) do
  if isContent(field) and isNews(field) then out[field] = value end
end
return reply('OK', out)
