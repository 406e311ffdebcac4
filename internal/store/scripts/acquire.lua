#!lua
-- acquire judges a demand against the record and answers it from there if it
-- can; else it takes the lease.
--
-- arg: owner, length, floor, slot, life, newer, reported (token id or ''),
-- credentials (with blanks between them), consent ('no', 'preferred', 'required'),
-- asked ('1' after UNKNOWN), settling (ms for which the caller may use no consent),
-- again ('1' has a lease of the owner's own judged anew), absent (id of a token
-- that cannot be used), peek ('1' takes no lease).
load('s:' .. arg.slot, 'a:' .. arg.slot)
local l, c, e, p = lease(), consent(), failure(), presented()
local mine = l and l.live and l.owner == arg.owner and l.fence == number('f')
local s = token(arg.slot)
if s and (s.id == arg.absent or tombstoned(s.id)) then s = nil end
local left = s and s.ends - now or 0

local function meets()
  return left > math.min(30 * second, s.life / 5) and left >= tonumber(arg.life)
    and s.g > tonumber(arg.newer) and s.id ~= arg.reported
end

local function tooLong()
  return tonumber(arg.life) > s.life - math.max(10 * second, s.life / 100)
end

-- holdOff is how long reports of a token are too soon, after it was obtained.
local function holdOff()
  local d, times = 10 * second, s.refused
  while times > 0 and d < 5 * minute do d, times = d * 2, times - 1 end
  return math.min(d, 5 * minute)
end

local function binds()
  if not e or not e.stands then return false end
  if e.kind == 'transient' or e.kind == 'throttled' then return true end
  if e.kind == 'rejected' then return (' ' .. arg.credentials .. ' '):find(' ' .. H.ek .. ' ', 1, true) ~= nil end
  return arg.consent == 'required' and c and H.ek == c.id -- dead
end

-- judge returns the verdict, and how long it stands in the way.
local function judge()
  if ended(arg.slot) then return 'ENDED' end
  if s and meets() then return 'USABLE' end
  if mine and arg.again ~= '1' then return 'GRANTED' end
  if s and s.id == arg.reported then
    local age = now - s.obtained
    if age <= minute then
      s.early = '1'
      mark('s:' .. arg.slot, registered(s))
    end
    if age < holdOff() then return 'TOO_SOON', holdOff() - age end
  end
  if left > 0 and tooLong() then return 'SHORT' end
  if binds() then return 'REFUSED' end
  if l and l.live and not mine then return 'BUSY', l.ends - now end
  if arg.consent ~= 'no' then
    if p and p.owner ~= '-' and p.owner ~= arg.owner and p.ends > now then return 'IN_DOUBT', p.ends - now end
    local wait = math.max(tonumber(arg.settling), settling())
    if wait > 0 then return 'UNKNOWN', wait end
  end
  if arg.consent == 'required' and not (c and c.lives) then
    if H.nc or number('d') > 0 or grant(H.r) then return 'UNAUTHORIZED' end
    if arg.asked ~= '1' then return 'UNKNOWN', second end
    put('nc', '1')
    return 'UNAUTHORIZED'
  end
  return 'GRANTED'
end

local code, wait = judge()
if code == 'GRANTED' and arg.peek == '1' and not mine then code = 'FREE' end
local out = {wait = wait and int(wait)}
if code == 'GRANTED' then
  local fence = mine and l.fence or nextGeneration(arg.floor)
  putMax('f', fence)
  putLease(fence, tonumber(arg.length), arg.owner)
  out.fence = int(fence)
  if arg.consent ~= 'no' and c and c.lives then
    out.r, out.rt, out.p = H.r, H.rt, H.p
  end
elseif code == 'USABLE' and l and l.owner == arg.owner or mine and code ~= 'ENDED' then
  put('l', nil)
end
commit()
if s then out.s, out.a = H['s:' .. arg.slot], H['a:' .. arg.slot] end
if code == 'UNAUTHORIZED' then out.r = H.r end
out.e, out.ec, out.ek, out.et = H.e, H.ec, H.ek, H.et
return reply(code, out)
