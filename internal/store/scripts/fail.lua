#!lua flags=allow-oom
-- fail remembers the failure of a call under a lease, and ends the lease.
--
-- arg: owner, fence, kind ('none', 'transient', 'throttled', 'rejected', 'dead'),
-- code, subject (a credential, or a refresh token's id), text, rest (ms, or
-- 'forever'), jitter, outcome ('unknown', 'unsent', 'answered').
load()
local e, p, c = failure(), presented(), consent()
local fence = tonumber(arg.fence)

local function answer(code)
  commit('fail')
  if code ~= 'OK' then return reply(code) end
  return reply(code, {e = H.e, ec = H.ec, ek = H.ek, et = H.et})
end

if e and e.fence == fence then return answer('OK') end
local l = lease()
local held, doubt = isMine(l), isMine(p)
if not held and not doubt then return answer('STALE') end

if held then put('l', nil) end
if doubt then
  if arg.outcome == 'unknown' then
    p.ends = math.min(p.ends, now)
  else
    p.count, p.fence, p.ends, p.owner = math.max(p.count - 1, 0), 0, 0, '-'
  end
  putPresentations(p)
end
local overtaken = fence <= math.max(number('d'), number('ff')) or e and e.fence > fence or
  not doubt and fence < number('f')
if arg.kind == 'none' or overtaken or arg.kind == 'dead' and not (c and c.id == arg.subject) then
  return answer('STALE')
end
local count, rest = (e and e.count or 0) + 1, tonumber(arg.rest)
if arg.kind == 'transient' or arg.kind == 'throttled' then
  local d, times = 5 * second, count - 1
  while times > 0 and d < minute do d, times = d * 2, times - 1 end
  rest = math.max(math.floor(math.min(d, minute) * tonumber(arg.jitter)), rest or 0)
end
if arg.kind == 'dead' then
  c.dead = fence
  putConsent(c, H.rt)
end
putFailure({fence = fence, kind = arg.kind, count = count, at = now, ends = rest and now + rest or 0},
  arg.code, arg.subject, arg.text)
return answer('OK')
