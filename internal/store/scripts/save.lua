#!lua flags=allow-oom
-- save stores what a call under a lease obtained. A grant that was obtained anew
-- is judged by the fence of the lease, one that spent a refresh token by that
-- token, and one that a person gave wins over all that is under way.
--
-- arg: owner, fence, slot, id, token (sealed), left, life, spent (id of a refresh
-- token or ''), refresh (id of the one that came, or ''), sealed (that one),
-- rotates ('unknown', 'yes', 'no'), ends (ms until the consent does, 0: unknown),
-- supersede ('1' or '0'), was (the spent consent's register, as the caller knows
-- it, or '').
local supersede, fence = arg.supersede == '1', tonumber(arg.fence)
if supersede or arg.slot ~= '' then
  loadAll()
else
  load('s:' .. arg.slot, 'a:' .. arg.slot)
end
local l, c, p, s = lease(), consent(), presented(), token(arg.slot)
local same, buried = s and s.id == arg.id, tombstoned(arg.id) or ended(arg.slot)
local known = c and c.id == arg.refresh
local brings = arg.refresh ~= '' and not known

local function judge()
  if same and not brings then return 'SAVED' end
  if brings and tombstoned(arg.refresh) then return 'DROPPED' end
  if supersede then
    -- saved before, and refreshed since?
    return c and c.origin == arg.refresh and 'SUPERSEDED' or 'SAVED'
  end
  if fence <= number('d') then return 'DROPPED' end
  if arg.spent ~= '' then
    if not c and tombstoned(arg.spent) then return 'DROPPED' end
    if c and c.id ~= arg.spent and not known then return 'SUPERSEDED' end
  elseif known and not isMine(l) then -- saved before, and the access token dropped since
    return 'SUPERSEDED'
  elseif buried then
    return 'DROPPED'
  elseif number('f') > fence then
    return 'STALE'
  end
  -- Nothing tells the order of two tokens of one refresh token but their leases.
  if s and s.g > fence and not brings and not isMine(l) then return 'STALE' end
  return 'SAVED'
end

-- clear takes out of service what another grant supersedes.
local function clear(g)
  if c then
    bury(c.origin, now + 10 * minute)
    c.g, c.state = g, '-'
    putConsent(c, nil)
  end
  each('s', function(slot, value)
    local other = register(value)
    if other and other.id ~= arg.id then
      bury(other.id, other.ends + 10 * minute)
      other.g, other.state = g, '-'
      putSlot(slot, other, nil)
    end
  end)
  put('l', nil)
  put('p', nil)
  c, p, brings = nil, nil, arg.refresh ~= ''
end

-- proved takes note of a refresh that left the refresh token as it is. A later
-- presentation may still be under way.
local function proved()
  c.proof = math.max(c.proof, c.dead, fence)
  if arg.rotates ~= 'unknown' then c.rotates = arg.rotates end
  putConsent(c, H.rt)
  p = presentations(c.id)
  if p.fence > fence then
    p.count = 1
  else
    p.count, p.fence, p.ends, p.owner = 0, 0, 0, '-'
  end
  putPresentations(p)
end

-- succeed makes the refresh token that came the record's: of the same grant if
-- the one before was spent for it.
local function succeed(g)
  local was = not supersede and arg.spent ~= '' and (c or arg.was ~= '' and grant(arg.was)) or
    {start = now, ends = tonumber(arg.ends) > 0 and now + tonumber(arg.ends) or 0, origin = arg.refresh}
  putConsent({
    g = g, id = arg.refresh, state = '+', rotates = arg.rotates, start = was.start, ends = was.ends,
    origin = was.origin, dead = 0, proof = 0,
  }, arg.sealed)
  put('p', nil)
  put('nc', nil)
end

local function takeToken(g)
  if same then
    s.obtained, s.refused, s.early = now, nextRefused(s), '0'
    if s.ends <= now then s.ends = now + tonumber(arg.left) end -- the server's own newer word
    return putSlot(arg.slot, s, H['a:' .. arg.slot])
  end
  putSlot(arg.slot, {
    g = g, id = arg.id, state = '+', obtained = now, ends = now + tonumber(arg.left), life = tonumber(arg.life),
    refused = nextRefused(s), early = '0',
  }, arg.token)
  putMax('g', g)
end

local function take()
  if supersede then
    fence = nextGeneration(fence)
    clear(fence)
    reset()
  end
  if isMine(l) then put('l', nil) end
  putMax('f', fence)
  local g = math.max(fence, number('g') + 1)
  clearFailure(fence)
  if brings then
    succeed(g)
    putMax('g', g)
  elseif arg.spent ~= '' and c and c.id == arg.spent then
    proved()
  end
  if not buried then takeToken(g) end
  if arg.slot ~= '' then prune() end
end

local code = judge()
if code == 'SAVED' then
  if not (same or buried) or brings or isMine(l) or isMine(p) then take() end
  s = token(arg.slot)
  if not s or s.id ~= arg.id then code = 'SUPERSEDED' end -- it was dropped; the refresh token was not
  touch()
end
commit('save')
return reply(code, {s = H['s:' .. arg.slot], a = H['a:' .. arg.slot], r = H.r})
